#!/usr/bin/env python3
"""Records what an NBD client says, as a seed for tests/it/nbd_fuzz.rs.

usage: record-dialogue.py SERVER-SOCKET OUT-PREFIX COMMAND...

Listens on a socket of its own, passes bytes on to the server's socket both ways, and writes the client's bytes of the n-th
connection to OUT-PREFIX-n.bin. "{}" in COMMAND becomes the socket to connect to.
"""
import os
import socket
import subprocess
import sys
import tempfile
import threading


def pump(source, sink, record):
    try:
        while data := source.recv(65536):
            if record is not None:
                record.extend(data)
            sink.sendall(data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        pass  # the other side is gone


def main():
    server, prefix, *command = sys.argv[1:]
    directory = tempfile.mkdtemp()
    path = os.path.join(directory, "proxy.sock")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    records = []

    def accept():
        while True:
            try:
                client, _ = listener.accept()
            except OSError:
                return
            upstream = socket.socket(socket.AF_UNIX)
            upstream.connect(server)
            records.append(bytearray())
            threading.Thread(target=pump, args=(client, upstream, records[-1]), daemon=True).start()
            threading.Thread(target=pump, args=(upstream, client, None), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    done = subprocess.run([word.replace("{}", path) for word in command], stdout=subprocess.DEVNULL, timeout=60)
    for n, record in enumerate(records):
        with open(f"{prefix}-{n}.bin", "wb") as out:
            out.write(record)
    os.remove(path)
    os.rmdir(directory)
    return done.returncode


sys.exit(main())
