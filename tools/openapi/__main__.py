from tools.openapi import main

main()
