"""KV blocks: groups, the page pool, the prefix index. Integers and pages; no model, no feature by name."""
