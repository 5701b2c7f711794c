//! `conbd create` and `conbd resize`: makes images, and makes them larger.

use super::{EXIT_OK, Failure, run_coroutine, with_sources, write_out};
use crate::block::qcow2::create::{CreateOptions, Preallocation, check_options, co_create};
use crate::block::qcow2::header::Compression;
use crate::block::{
    self, BlockNode as _, FileNode, FileOptions, LockMode, OpenError, OpenOptions, OpenRemote, co_open_qcow2,
};
use crate::config::{Format, Size};
use crate::nbd::backing::NbdBacking;
use clap::{Args, ValueEnum};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Format of a new image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum NewFormat {
    /// QEMU copy-on-write
    Qcow2,
    /// the bytes as they are
    Raw,
}

/// Version of a new image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Compat {
    /// version 2
    #[value(name = "0.10")]
    V2,
    /// version 3
    #[value(name = "1.1")]
    V3,
}

/// How clusters are compressed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum CompressionArg {
    /// deflate
    Zlib,
    /// Zstandard
    Zstd,
}

/// What is allocated from the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum PreallocationArg {
    /// nothing
    Off,
    /// the tables; the file stays sparse
    Metadata,
    /// tables and space
    Falloc,
    /// tables, and zeroes in all of the space
    Full,
}

/// Create an image
///
/// The file must not exist. Defaults are those of qemu-img: version 3, 64k clusters, 16-bit refcounts.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  conbd create disk.qcow2 20G\n  conbd create overlay.qcow2 --backing base.qcow2 --backing-format qcow2\n  \
                  conbd create disk.qcow2 1T --cluster-size 128k --extended-l2\n  conbd create --format raw disk.raw 10G"
)]
pub(crate) struct CreateArgs {
    /// The file
    image: PathBuf,

    /// Virtual size, such as 20G [default: that of the backing file]
    size: Option<Size>,

    /// Format
    #[arg(long, short = 'f', value_enum, default_value = "qcow2")]
    format: NewFormat,

    /// Bytes of a cluster, a power of two from 512 to 2M
    #[arg(long, value_name = "SIZE", default_value = "64k")]
    cluster_size: Size,

    /// Bits of a reference count: 1, 2, 4, 8, 16, 32 or 64
    #[arg(long, value_name = "BITS", default_value_t = 16)]
    refcount_bits: u32,

    /// Version: 0.10 is for readers from before 2012
    #[arg(long, value_enum, default_value = "1.1")]
    compat: Compat,

    /// Allocate in 32 parts of a cluster: best for overlays, with a cluster size of 128k
    #[arg(long)]
    extended_l2: bool,

    /// Allow other programs to update reference counts late
    #[arg(long)]
    lazy_refcounts: bool,

    /// What compressed clusters are to be compressed with
    #[arg(long, value_enum, default_value = "zlib")]
    compression_type: CompressionArg,

    /// Backing file: what the new image does not hold is read from it
    #[arg(long, short = 'b', value_name = "FILE", requires = "backing_format")]
    backing: Option<PathBuf>,

    /// Format of the backing file: raw or qcow2
    #[arg(long, short = 'F', value_name = "FORMAT", requires = "backing")]
    backing_format: Option<Format>,

    /// Keep the data in this file, which must not exist
    #[arg(long, value_name = "FILE")]
    data_file: Option<PathBuf>,

    /// Let the data file be a raw image of its own
    #[arg(long, requires = "data_file")]
    data_file_raw: bool,

    /// What is allocated from the start
    #[arg(long, value_enum, default_value = "off")]
    preallocation: PreallocationArg,
}

/// Make an image larger
///
/// The new space reads as zeroes. Images are never made smaller. An image that is being served is made larger by its server: set
/// grow_to in the configuration file, and reload it (SIGHUP; see conbd.toml(5)).
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  conbd resize disk.qcow2 40G")]
pub(crate) struct ResizeArgs {
    /// The image
    image: PathBuf,

    /// Its new size, such as 40G
    size: Size,

    /// qcow2: the image may read its backing image from the NBD server that it names
    #[arg(long)]
    allow_backing_nbd: bool,

    /// Format [default: auto]
    #[arg(long, short = 'f', value_enum, default_value = "auto")]
    format: Format,
}

fn bytes(path: &Path) -> Vec<u8> {
    path.as_os_str().as_bytes().to_vec()
}

/// A path that an image at `image` is to name: relative names are relative to it, as when it is opened.
fn beside(image: &Path, name: &Path) -> PathBuf {
    image.parent().unwrap_or(Path::new("")).join(name)
}

pub(crate) fn create(args: &CreateArgs) -> Result<u8, Failure> {
    let failed = |e: &dyn std::error::Error| Failure::failed(with_sources(e));
    let mut size = args.size.map(|s| s.0);
    if let (Some(name), Some(format)) = (&args.backing, args.backing_format) {
        // Opened: that it can be, and how large it is, is found out now and not when it is needed.
        let options = OpenOptions {
            format: match format {
                Format::Raw => block::Format::Raw,
                Format::Qcow2 => block::Format::Qcow2,
                Format::Auto => return Err(Failure::usage("--backing-format must be raw or qcow2")),
            },
            read_only: true,
            lock: LockMode::Off,
            ..OpenOptions::new(beside(&args.image, name))
        };
        let backing = block::open(&options)
            .map_err(|e| Failure::failed(format!("backing file: {}", with_sources(&e))))?;
        size = size.or(Some(backing.len()));
    }
    let Some(size) = size else {
        return Err(Failure::usage("the size is missing, such as: conbd create disk.qcow2 20G"));
    };
    let preallocation = match args.preallocation {
        PreallocationArg::Off => Preallocation::Off,
        PreallocationArg::Metadata => Preallocation::Metadata,
        PreallocationArg::Falloc => Preallocation::Falloc,
        PreallocationArg::Full => Preallocation::Full,
    };
    if args.format == NewFormat::Raw {
        return create_raw(args, size, preallocation);
    }
    let options = CreateOptions {
        cluster_size: args.cluster_size.0,
        refcount_bits: args.refcount_bits,
        v2: args.compat == Compat::V2,
        extended_l2: args.extended_l2,
        lazy_refcounts: args.lazy_refcounts,
        compression: match args.compression_type {
            CompressionArg::Zlib => Compression::Zlib,
            CompressionArg::Zstd => Compression::Zstd,
        },
        backing: args.backing.as_deref().zip(args.backing_format).map(|(name, format)| {
            (bytes(name), if format == Format::Raw { b"raw".to_vec() } else { b"qcow2".to_vec() })
        }),
        data_file: args.data_file.as_deref().map(bytes),
        data_file_raw: args.data_file_raw,
        preallocation,
        ..CreateOptions::new(size)
    };
    check_options(&options).map_err(Failure::usage)?;
    let data = args.data_file.as_deref().map(|name| beside(&args.image, name));
    let data_file = data.as_deref().map(new_file).transpose()?;
    let file = match new_file(&args.image) {
        Ok(file) => file,
        Err(e) => {
            // Ours, made a moment ago, and empty: what cannot be removed does no harm.
            data.iter().for_each(|path| drop(std::fs::remove_file(path)));
            return Err(e);
        }
    };
    run_coroutine(move || {
        let data: Option<&dyn block::BlockNode> = data_file.as_ref().map(|d| d as _);
        co_create(&file, data, &options)
    })
    .map_err(|e| failed(&e))?
    .map_err(|e| failed(&e))?;
    Ok(EXIT_OK)
}

/// Makes an empty file, which must not exist yet, and opens it to grow.
fn new_file(path: &Path) -> Result<FileNode, Failure> {
    std::fs::OpenOptions::new().write(true).create_new(true).open(path).map_err(|e| {
        let hint = if e.kind() == std::io::ErrorKind::AlreadyExists {
            "; remove it first, or choose another name"
        } else {
            ""
        };
        Failure::failed(format!("cannot create {path:?}: {e}{hint}"))
    })?;
    let options = FileOptions { growable: true, ..FileOptions::new(path) };
    FileNode::open(&options).map_err(|e: OpenError| Failure::failed(with_sources(&e)))
}

fn create_raw(args: &CreateArgs, size: u64, preallocation: Preallocation) -> Result<u8, Failure> {
    if args.backing.is_some() || args.data_file.is_some() || args.extended_l2 || args.lazy_refcounts {
        return Err(Failure::usage(
            "a raw image has no backing file, data file or tables; use --format qcow2",
        ));
    }
    if preallocation == Preallocation::Metadata {
        return Err(Failure::usage("a raw image has no metadata; use --preallocation falloc or full"));
    }
    let file = new_file(&args.image)?;
    let made = run_coroutine(move || -> block::Result<()> {
        file.co_truncate(size)?;
        match preallocation {
            Preallocation::Falloc if size > 0 => {
                file.co_pwrite_zeroes(0, size, block::WriteFlags::empty())?;
            }
            Preallocation::Full => {
                let zeroes = vec![0u8; 1 << 20];
                let mut at = 0;
                while at < size {
                    let n = (size - at).min(zeroes.len() as u64);
                    let piece = std::io::IoSlice::new(&zeroes[..n as usize]);
                    file.co_pwritev(at, &[piece], block::WriteFlags::empty())?;
                    at += n;
                }
            }
            _ => {}
        }
        file.co_flush()
    });
    made.map_err(Failure::failed)?.map_err(|e| Failure::failed(with_sources(&e)))?;
    Ok(EXIT_OK)
}

pub(crate) fn resize(args: &ResizeArgs) -> Result<u8, Failure> {
    let format = match args.format {
        Format::Auto => block::Format::Auto,
        Format::Raw => block::Format::Raw,
        Format::Qcow2 => block::Format::Qcow2,
    };
    let options = OpenOptions {
        format,
        remote: args.allow_backing_nbd.then(|| Arc::new(NbdBacking::default()) as Arc<dyn OpenRemote>),
        ..OpenOptions::new(&args.image)
    };
    let path = args.image.clone();
    let size = args.size.0;
    let smaller =
        move |now: u64| format!("image {path:?} has {now} bytes, which is more: images are not made smaller");
    let outcome = run_coroutine(move || -> Result<u64, String> {
        match co_open_qcow2(&options) {
            Ok(node) => {
                let now = node.len();
                if size < now {
                    return Err(smaller(now));
                }
                if !size.is_multiple_of(512) {
                    return Err(format!(
                        "{size} is not a multiple of 512 bytes, as the size of a qcow2 image is"
                    ));
                }
                let grown = node.co_grow(size).map_err(|e| with_sources(&e));
                let closed = node.co_close().map_err(|e| with_sources(&e));
                grown.and(closed).map(|()| now)
            }
            Err(OpenError::NotQcow2 { .. }) => {
                let file =
                    FileNode::open(&FileOptions { growable: true, ..FileOptions::new(&options.filename) })
                        .map_err(|e| with_sources(&e))?;
                let now = file.len();
                if size < now {
                    return Err(smaller(now));
                }
                file.co_truncate(size).and_then(|()| file.co_flush()).map_err(|e| with_sources(&e))?;
                Ok(now)
            }
            Err(e @ OpenError::Locked { .. }) => Err(format!(
                "{}; if conbd serves it, set grow_to in its configuration file and reload (SIGHUP)",
                with_sources(&e)
            )),
            Err(e) => Err(with_sources(&e)),
        }
    });
    let before = outcome.map_err(Failure::failed)?.map_err(Failure::failed)?;
    write_out(&format!("{}: {before} bytes before, {size} bytes now\n", args.image.display()))?;
    Ok(EXIT_OK)
}
