"""The normalizers behind `cpnb.normalize`, one family per file."""
