"""How function-preserving rescaling reads a model and moves its weights."""
