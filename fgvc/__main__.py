from fgvc.cli.app import main

main()
