"""The loop: plan, execute, commit, emit. The only room that sees everything below."""
