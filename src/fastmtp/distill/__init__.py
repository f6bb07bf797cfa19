from fastmtp.extras import require

require("data")
