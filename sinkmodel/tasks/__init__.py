"""Tasks whose answers stand in a long prompt: made after RULER's definitions, or from the user's own text."""
