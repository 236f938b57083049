"""The front door: what a person types. Nothing heavy is imported until a verb runs, so `--help` is instant."""
