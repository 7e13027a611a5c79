from launcher.cli import main

if __name__ == "__main__":  # a process pool imports this file again
    main()
