"""Behind `cpnb.widgets`: answers, measuring in the background, and the picture."""
