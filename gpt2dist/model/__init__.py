"""GPT-2: architecture, initialization, generation."""
