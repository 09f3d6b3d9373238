"""From a Dynamo graph to a graph over compressed caches: normalise, match, rewrite."""
