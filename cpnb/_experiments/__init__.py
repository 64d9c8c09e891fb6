"""What stands behind `cpnb.experiments`: the definitions, and what the records say."""
