from fastmtp.cli import main

main()
