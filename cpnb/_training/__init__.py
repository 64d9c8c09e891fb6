"""The parts behind `cpnb.fit`."""
