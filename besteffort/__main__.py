from besteffort.cli import main

main()
