"""The graded track on quantized kernels: being written. The `puzzles` command says what exists."""
