"""Lessons: src/ holds them as scripts, build.py makes notebooks of them, _course.py is what they
call; exercises/ says what a learner's kernel must compute."""
