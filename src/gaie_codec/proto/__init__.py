"""Tools for the schemas themselves: read one from anywhere, compare two, write one as text, keep it as a snapshot.

For maintainers, the command line and `probe`; nothing on a request's path imports this package. docs/protos.md explains the whole.

`compile`     a `.proto` file, a folder, a package or a descriptor file -> a FileDescriptorSet
`canonical`   descriptors -> their wire facts, a canonical form and its hash
`text`        descriptors -> `.proto` text
`download`    `PACKAGE==VERSION` -> a folder to read
`vendoring`   a schema -> a folder of `proto_vendor/` -> run-time data
`catalogue`   what is known of every snapshot and of every published schema, also where there is no `proto_vendor/`
"""
