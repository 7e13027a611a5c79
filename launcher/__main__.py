if __name__ == "__main__":  # a process pool imports this file again
    from trainer.interruption import current

    current.begin()
    from launcher.cli.app import main

    main()
