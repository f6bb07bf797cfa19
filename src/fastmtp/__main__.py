from fastmtp.cli.main import main

main()
