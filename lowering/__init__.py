"""From a decode step to code: the byte layout, the custom ops and their implementations."""
