"""The stacks, one file each; `roles` is what they share, `entrance` and `servers` are parts of the orchestrator's."""
