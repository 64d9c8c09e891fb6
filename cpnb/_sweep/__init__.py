"""Behind `cpnb.sweep`: the table, its points and files, and how they are measured."""
