"""What a learner's kernel must compute: one problem a file, as in parity/problems."""
