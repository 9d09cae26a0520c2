"""A server that draws: jobs in a queue, one worker that owns the pipeline, a history on the disk, HTTP around them."""
