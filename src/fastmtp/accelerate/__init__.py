"""What `fastmtp accelerate` does: facts, a plan, its stages, and which of them are done."""

from fastmtp.extras import require

require("torch", "data")
