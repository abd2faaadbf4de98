"""What the commands tell: progress while they run (Reporter), and a result when they are done (dataclasses)."""
