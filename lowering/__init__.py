"""From a decode step to code: the format of a cache, the custom ops and their implementations."""
