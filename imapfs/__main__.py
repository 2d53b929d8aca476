from imapfs.cli import main

main()
