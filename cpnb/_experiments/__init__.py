"""What stands behind `cpnb.experiments`: one cell at a time, and the record of all."""
