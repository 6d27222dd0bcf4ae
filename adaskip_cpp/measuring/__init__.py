"""How speed and quality are measured: timing, texts and tasks, scores."""
