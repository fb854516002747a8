"""A synthetic table of students' outcomes, its summary figures and its generator."""
