"""Memories on equal terms: what each costs in nats, bytes and time on the same prompts (`sink-eval memories`)."""
