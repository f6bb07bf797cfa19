from fastmtp.extras import require

require("torch")
