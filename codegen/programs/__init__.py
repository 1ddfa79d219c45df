"""From plans to programs: printing, running, joining, chunking, explaining, tuning, caching."""
