"""The stacks, one file each, in the order in which they are built on one another; `roles` is what they share."""
