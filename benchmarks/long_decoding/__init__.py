"""One long text decoded token by token: what the cache holds, what a token costs, whether far text helps or harms."""
