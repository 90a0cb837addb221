//! `cargo xtask images`: container images without a container engine, and the images of the tests' clusters. An image has its
//! programs, the shared libraries that they are linked to, and nothing else: no shell. What an image is as a file is oci.rs's
//! business.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use tempfile::NamedTempFile;

use crate::build::{self, Profile};
use crate::oci::Image;
use crate::packages::Purpose;
use crate::tree::{self, find_program};
use crate::{ebpf, elf, say, setup};

/// Make container images of the agent and the controller, without a container engine
#[derive(clap::Args)]
#[command(
    long_about = "Make container images of the agent and the controller, without a container engine, in target/images. \
        Load them on a node with `ctr -n k8s.io images import FILE`, or push them with a tool of yours.\n\n\
        The same commit, built by the same compilers and beside the same libraries, makes the same images, byte by byte, \
        wherever the checkout is.",
    after_help = "Examples:\n  cargo xtask images\n  cargo xtask images --repository example.org/weft --tag 0.1.0"
)]
pub struct Arguments {
    /// What stands before the images' names
    #[arg(long, default_value = "localhost")]
    repository: String,
    /// The images' tag
    #[arg(long, default_value = "dev")]
    tag: String,
}

pub fn main(arguments: &Arguments) -> Result<()> {
    setup::ensure(Purpose::BuildEbpf)?;
    ebpf::build()?;
    say::step("Agent and controller, in release mode");
    let programs = build::programs(Profile::Release)?;
    // After the others: it takes the place of the plugin that is linked to libraries.
    let plugin = build::static_plugin(Profile::Release)?;
    let dir = tree::target()?.join("images");
    for path in ours(&programs, &plugin, &dir, &arguments.repository, &arguments.tag)? {
        let size = fs::metadata(&path)?.len() >> 20;
        say::success(&format!("{} ({size} MB)", path.display()));
    }
    Ok(())
}

/// The images that the tests' clusters get: ours as developed, and programs of Debian's that stand for applications.
pub fn for_tests(programs: &Path) -> Result<()> {
    let dir = tree::target()?.join("test-images");
    ours(programs, &build::static_plugin(Profile::Development)?, &dir, "localhost", "dev")?;

    let mut busybox = Image::new("", &[]);
    add_busybox(&mut busybox)?;
    busybox.write(&dir.join("busybox.tar"), "localhost/busybox:test")?;

    // The container that holds a pod's namespaces only has to stay.
    let mut pause = Image::new("", &["/bin/busybox", "sleep", "2147483647"]);
    pause.file("bin/busybox", fs::read(installed("busybox")?)?);
    pause.write(&dir.join("pause.tar"), "localhost/pause:test")?;

    let mut nginx = Image::new("", &["/usr/sbin/nginx"]);
    add_program(&mut nginx, "/usr/sbin/nginx", &installed("nginx")?)?;
    // nginx looks up the user for its workers.
    nginx.file("etc/passwd", b"root:x:0:0::/:\nnobody:x:65534:65534::/:\n".to_vec());
    nginx.file("etc/group", b"root:x:0:\nnogroup:x:65534:\n".to_vec());
    nginx.write(&dir.join("nginx.tar"), "localhost/nginx:test")?;

    let mut curl = Image::new("", &[]);
    add_busybox(&mut curl)?;
    add_program(&mut curl, "/usr/bin/curl", &installed("curl")?)?;
    curl.write(&dir.join("curl.tar"), "localhost/curl:test").map(drop)
}

/// Agent, plugin and controller.
fn ours(programs: &Path, plugin: &Path, dir: &Path, repository: &str, tag: &str) -> Result<Vec<PathBuf>> {
    let mut agent = Image::new("", &["/weft-agent"]);
    add_program(&mut agent, "/weft-agent", &programs.join("weft-agent"))?;
    add_plugin(&mut agent, "/weft-cni", plugin)?;
    // Not root where nothing needs it.
    let mut control = Image::new("65532:65532", &["/weft-control"]);
    add_program(&mut control, "/weft-control", &programs.join("weft-control"))?;
    [("weft-agent", agent), ("weft-control", control)]
        .into_iter()
        .map(|(name, image)| {
            image.write(&dir.join(format!("{name}.tar")), &format!("{repository}/{name}:{tag}"))
        })
        .collect()
}

/// A program that the agent copies to nodes, where other libraries may be.
fn add_plugin(image: &mut Image, path: &str, program: &Path) -> Result<()> {
    let bytes = stripped(program)?;
    let needed = elf::needed(&bytes).with_context(|| program.display().to_string())?;
    ensure!(
        needed.is_empty(),
        "{} needs {} of the node it is copied to",
        program.display(),
        needed.join(", ")
    );
    image.file(path, bytes);
    Ok(())
}

/// A program with every library that it is linked to, at the paths where its loader will look for them.
fn add_program(image: &mut Image, path: &str, program: &Path) -> Result<()> {
    image.file(path, stripped(program)?);
    for library in libraries(program)? {
        image.file(&library, fs::read(&library).with_context(|| library.clone())?);
    }
    Ok(())
}

/// A shell and its tools.
fn add_busybox(image: &mut Image) -> Result<()> {
    let program = installed("busybox")?;
    let applets = Command::new(&program).arg("--list").output().context("busybox --list")?;
    image.file("bin/busybox", fs::read(&program)?);
    for applet in String::from_utf8(applets.stdout)?.split_whitespace().filter(|applet| *applet != "busybox")
    {
        image.link(&format!("bin/{applet}"), "/bin/busybox");
    }
    Ok(())
}

fn installed(program: &str) -> Result<PathBuf> {
    find_program(program).with_context(|| format!("{program} is not installed: cargo xtask setup"))
}

/// The program without what only a debugger needs, and without the hash over that.
fn stripped(program: &Path) -> Result<Vec<u8>> {
    let scratch = NamedTempFile::new().context("a temporary file")?;
    let mut command = Command::new("strip");
    command
        .args(["--strip-debug", "--remove-section=.note.gnu.build-id", "-o"])
        .arg(scratch.path())
        .arg(program);
    let status = command.status().context("strip (Debian: binutils)")?;
    ensure!(status.success(), "strip {} failed", program.display());
    fs::read(scratch.path()).context("what strip wrote")
}

/// Every shared library that the loader would open for `program`, the loader included.
fn libraries(program: &Path) -> Result<Vec<String>> {
    let output = Command::new("ldd").arg(program).output().context("ldd (Debian: libc-bin)")?;
    let text = String::from_utf8(output.stdout)?;
    if text.contains("not found") {
        bail!("{} lacks a library:\n{text}", program.display());
    }
    Ok(paths_in(&text))
}

/// `libc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x...)`, or the path alone; what is no file (the vDSO) has none.
fn paths_in(ldd: &str) -> Vec<String> {
    ldd.lines()
        .filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')))
        .map(str::to_owned)
        .collect()
}

#[cfg(test)]
mod tests {
    use std::fs::Permissions;
    use std::os::unix::fs::PermissionsExt;
    use std::time::{Duration, SystemTime};

    use nix::sys::stat::{Mode, umask};

    use super::*;

    /// Linked to the C library, as almost everything is.
    const DYNAMIC: &str = "/bin/true";

    #[test]
    fn libraries_are_found_in_what_ldd_prints() {
        let printed = "\tlinux-vdso.so.1 (0x00007ffd)\n\tlibc.so.6 => /lib/x86_64-linux-gnu/libc.so.6 (0x00007f)\n\t\
                       /lib64/ld-linux-x86-64.so.2 (0x00007f)\n";
        assert_eq!(paths_in(printed), ["/lib/x86_64-linux-gnu/libc.so.6", "/lib64/ld-linux-x86-64.so.2"]);
        assert!(paths_in("\tnot a dynamic executable\n").is_empty());
    }

    /// The same programs, brought to different directories by different people at different times.
    #[test]
    fn images_know_nothing_of_where_and_when_their_files_were_made() -> Result<()> {
        let image = |age: u64, mask: u32, mode: u32| -> Result<Vec<u8>> {
            let before = umask(Mode::from_bits_truncate(mask));
            let dir = tempfile::tempdir()?;
            let program = dir.path().join("program");
            fs::copy(DYNAMIC, &program)?;
            fs::set_permissions(&program, Permissions::from_mode(mode))?;
            fs::File::open(&program)?.set_modified(SystemTime::now() - Duration::from_secs(age))?;
            let mut image = Image::new("", &["/program"]);
            add_program(&mut image, "/program", &program)?;
            let path = image.write(&dir.path().join("images/one.tar"), "localhost/one:dev")?;
            umask(before);
            Ok(fs::read(path)?)
        };
        let (one, other) = (image(0, 0o022, 0o755)?, image(1_000_000, 0o077, 0o700)?);
        assert!(one == other, "{} and {} bytes", one.len(), other.len());
        Ok(())
    }

    #[test]
    fn a_plugin_that_needs_libraries_gets_into_no_image() {
        let added = add_plugin(&mut Image::default(), "/weft-cni", Path::new(DYNAMIC));
        let error = added.err().map(|error| error.to_string()).unwrap_or_default();
        assert!(error.contains("libc.so") && error.contains("ld-linux"), "{error:?}");
    }
}
