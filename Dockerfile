# Builds conbd and puts it alone into a small image.
ARG RUST_IMAGE=docker.io/library/rust:1.95-bookworm
ARG BASE_IMAGE=docker.io/library/debian:bookworm-slim

FROM ${RUST_IMAGE} AS build
WORKDIR /src
COPY . .
RUN scripts/build-deps.sh && cargo build --release --locked
# The TLS libraries go along: the slim image has none.
RUN mkdir /out && cd / && ldd /src/target/release/conbd | awk '$1 ~ /^lib(ssl|crypto)/ {sub("^/lib/", "/usr/lib/", $3); print $3}' | xargs cp -L --parents -t /out

FROM ${BASE_IMAGE}
COPY --from=build /out/ /
COPY --from=build /src/target/release/conbd /usr/local/bin/conbd
# The image file must be readable and writable for this user (chown 65532, or run with --user).
USER 65532:65532
EXPOSE 10809
HEALTHCHECK --interval=30s --timeout=5s CMD ["conbd", "inspect", "nbd://127.0.0.1:10809/"]
ENTRYPOINT ["conbd"]
CMD ["serve", "/disk.raw", "--listen", "0.0.0.0:10809"]
