"""Parts of `cpnb.diagnostics`, one question to a file."""
