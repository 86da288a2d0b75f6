"""From code to a running installation."""
