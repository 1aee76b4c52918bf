"""Everything that knows Ray: job spec, driver, loops, actor groups and workers."""
