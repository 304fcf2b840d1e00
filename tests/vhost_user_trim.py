#!/usr/bin/env python3
"""Between User Mode Linux and a vhost-user back-end: `vhost_user_trim.py LISTEN BACKEND`, for one front-end.

UML's driver sends SET_MEM_TABLE with room for two memory regions and says that one is in use (virtio_uml.c,
vhost_user_set_mem_table()). The rust-vmm crate `vhost` takes a message of exactly the regions in use and refuses others, as
the specification's "payload size" suggests. This cuts the rest off. Requests and data pass through shared memory and
descriptors, which are handed on as they are.
"""
import socket
import struct
import sys
import threading

SET_MEM_TABLE = 5
HEADER = struct.Struct("<III")


def receive(sock, count, fds):
    data = b""
    while len(data) < count:
        part, found, _, _ = socket.recv_fds(sock, count - len(data), 16)
        if not part:
            raise EOFError
        data += part
        fds.extend(found)
    return data


def forward(source, sink):
    try:
        while True:
            fds = []
            code, flags, size = HEADER.unpack(receive(source, HEADER.size, fds))
            payload = receive(source, size, fds)
            if code == SET_MEM_TABLE and len(payload) >= 8 and not flags & 4:
                (regions,) = struct.unpack_from("<I", payload)
                payload = payload[: 8 + 32 * regions]
            message = HEADER.pack(code, flags, len(payload)) + payload
            socket.send_fds(sink, [message], fds)
            for fd in fds:
                socket.close(fd)
    except (EOFError, OSError):
        for sock in (source, sink):
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


listener = socket.socket(socket.AF_UNIX)
listener.bind(sys.argv[1])
listener.listen(1)
front, _ = listener.accept()
back = socket.socket(socket.AF_UNIX)
back.connect(sys.argv[2])
answers = threading.Thread(target=forward, args=(back, front))
answers.start()
forward(front, back)
answers.join()
