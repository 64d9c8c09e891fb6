"""What stands behind `cpnb.compare`: cells, their records, and the table of all."""
