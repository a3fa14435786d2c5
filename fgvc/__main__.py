from fgvc.cli import main

main()
