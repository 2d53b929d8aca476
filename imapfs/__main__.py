from imapfs.cli.main import main

main()
