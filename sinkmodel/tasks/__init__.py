"""Tasks whose answers are in a long prompt: made by RULER's definitions, or from the user's own text."""
