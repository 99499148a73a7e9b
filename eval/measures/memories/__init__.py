"""Compares KV memories on the same prompts: nats, bytes and times (`sink-eval memories`)."""
