"""What a flow is made of: one module per stage, over `tasks.media` (video) and `tasks.models` (networks)."""
