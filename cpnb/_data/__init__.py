"""The parts behind `cpnb.load_data`."""
