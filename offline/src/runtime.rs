//! A runtime that generates and never runs.

use std::sync::{Arc, Mutex};

use cubecl::cuda::{CudaCompiler, CudaDevice, CudaRuntime};
use cubecl::ir::features::Plane;
use cubecl::ir::{
    DeviceProperties, ElemType, FloatKind, HardwareProperties, MemoryDeviceProperties, TargetProperties,
};
use cubecl::prelude::*;
use cubecl::server::*;
use cubecl_common::bytes::Bytes;
use cubecl_common::device::{DeviceId, DeviceService, ServerUtilitiesHandle};
use cubecl_common::future::DynFut;
use cubecl_common::profile::{ProfileDuration, TimingMethod};
use cubecl_common::stream_id::StreamId;
use cubecl_core::zspace::{Shape, Strides};
use cubecl_cpp::cuda::arch::CudaArchitecture;
use cubecl_cpp::cuda::{CudaDialect, mma::CudaWmmaCompiler};
use cubecl_cpp::shared::{CompilationOptions, CppSupportedFeatures, DialectWmmaCompiler};
use cubecl_runtime::allocator::ContiguousMemoryLayoutPolicy;
use cubecl_runtime::compiler::CubeTask;
use cubecl_runtime::logging::ServerLogger;
use cubecl_runtime::memory_management::*;
use cubecl_runtime::storage::{BytesResource, BytesStorage, ComputeStorage, ManagedResource};
use cubecl_runtime::timestamp_profiler::TimestampProfiler;

/// A kernel as CubeCL would hand it to NVRTC.
#[derive(Clone, Debug)]
pub struct Generated {
    /// The entry point.
    pub name: String,
    /// By what CubeCL finds the kernel again when it keeps compiled ones on disk.
    pub key: String,
    /// Units per cube.
    pub units: u32,
    /// Dynamic shared memory in bytes.
    pub shared_memory: usize,
    /// CUDA C++.
    pub source: String,
}

static GENERATED: Mutex<Vec<Generated>> = Mutex::new(Vec::new());

/// All kernels generated since the last call.
pub fn take_generated() -> Vec<Generated> {
    std::mem::take(&mut GENERATED.lock().expect("no generator panicked"))
}

/// The stand-in for an H200: device 0 has all of its multiprocessors, device 1 a single one.
#[derive(Debug, Clone)]
pub struct OfflineCuda;

/// The server behind [`OfflineCuda`]: it allocates host memory and records kernels.
#[derive(Debug)]
pub struct OfflineServer {
    memory: MemoryManagement<BytesStorage>,
    timestamps: TimestampProfiler,
    utilities: Arc<ServerUtilities<Self>>,
}

/// Whether kernels also run, on this CPU, and if so whether the planes of a cube take their turns backwards.
static EMULATION: Mutex<Option<bool>> = Mutex::new(None);

/// From now on launches run on this CPU, slowly; see `emulator.hpp`. Shared memory holds NaN before a cube
/// begins, as fresh buffers do. `backwards` lets the planes of a cube take turns in the other order.
pub fn emulate(backwards: bool) {
    *EMULATION.lock().expect("nobody panicked") = Some(backwards);
}

impl OfflineServer {
    fn host_memory(&mut self, binding: &Binding) -> (*mut u8, usize) {
        let (memory, start, end) = (binding.memory.clone(), binding.offset_start, binding.offset_end);
        let resource = self.memory.get_resource(memory, start, end).expect("a live binding");
        resource.get_write_ptr_and_length()
    }
}

fn h200_options() -> CompilationOptions {
    CompilationOptions {
        warp_size: 32,
        supports_features: CppSupportedFeatures {
            grid_constants: true,
            clusters: true,
            fast_math: true,
            fast_tanh: true,
            elect_sync: true,
        },
    }
}

fn h200_properties(multiprocessors: u32) -> DeviceProperties {
    let arch = CudaArchitecture { version: 90 };
    let hardware = HardwareProperties {
        load_width: 128,
        plane_size_min: 32,
        plane_size_max: 32,
        max_bindings: 1024,
        max_shared_memory_size: 232_448,
        max_cube_count: (i32::MAX as u32, 65535, 65535),
        max_units_per_cube: 1024,
        max_cube_dim: (1024, 1024, 64),
        num_streaming_multiprocessors: Some(multiprocessors),
        num_tensor_cores: Some(4),
        min_tensor_cores_dim: Some(8),
        num_cpu_cores: None,
        max_vector_size: usize::MAX,
    };
    let memory = MemoryDeviceProperties { max_page_size: 37 << 30, alignment: 512 };
    let mut p = DeviceProperties::new(Default::default(), memory, hardware, TimingMethod::System);
    cubecl_cpp::register_supported_types(&mut p);
    p.features.copy_async = true;
    for plane in [Plane::Ops, Plane::Sync, Plane::NonUniformControlFlow] {
        p.features.plane.insert(plane);
    }
    for t in [FloatKind::F16, FloatKind::BF16] {
        p.features.matmul.ldmatrix.insert(ElemType::Float(t).into());
        p.features.matmul.stmatrix.insert(ElemType::Float(t).into());
    }
    type Wmma = CudaWmmaCompiler;
    let mma = <Wmma as DialectWmmaCompiler<CudaDialect<Wmma>>>::supported_mma_combinations(&arch);
    cubecl_cpp::shared::register_mma_features(mma, &mut p);
    p
}

impl DeviceService for OfflineServer {
    fn init(id: DeviceId) -> Self {
        let properties = h200_properties(if id.index_id == 0 { 132 } else { 1 });
        let logger = Arc::new(ServerLogger::default());
        let memory = MemoryManagement::from_configuration(
            BytesStorage::default(),
            &properties.memory,
            MemoryConfiguration::ExclusivePages,
            logger.clone(),
            MemoryManagementOptions::new("offline"),
        );
        let policy = ContiguousMemoryLayoutPolicy::new(512);
        let utilities = Arc::new(ServerUtilities::new(properties, logger, (), policy));
        Self { memory, timestamps: Default::default(), utilities }
    }

    fn utilities(&self) -> ServerUtilitiesHandle {
        self.utilities.clone() as ServerUtilitiesHandle
    }
}

impl ServerCommunication for OfflineServer {
    const SERVER_COMM_ENABLED: bool = false;
}

impl ComputeServer for OfflineServer {
    type Kernel = Box<dyn CubeTask<CudaCompiler>>;
    type Storage = BytesStorage;
    type MemoryLayoutPolicy = ContiguousMemoryLayoutPolicy;
    type Info = ();

    fn logger(&self) -> Arc<ServerLogger> {
        self.utilities.logger.clone()
    }

    fn utilities(&self) -> Arc<ServerUtilities<Self>> {
        self.utilities.clone()
    }

    fn initialize_memory(&mut self, memory: ManagedMemoryHandle, size: u64, _: StreamId) {
        let reserved = self.memory.reserve(size).expect("host memory");
        let resource =
            self.memory.get_resource(reserved.clone().binding(), None, None).expect("just reserved");
        let (at, len) = resource.get_write_ptr_and_length();
        // Safety: the allocation is fresh. All bits set are NaN in every float type.
        unsafe { std::ptr::write_bytes(at, 0xff, len) };
        self.memory.bind(reserved, memory, 0).expect("a fresh handle");
    }

    fn read(&mut self, what: Vec<CopyDescriptor>, _: StreamId) -> DynFut<Result<Vec<Bytes>, ServerError>> {
        let all = what
            .into_iter()
            .map(|d| {
                let (from, len) = self.host_memory(&d.handle);
                // Safety: the allocation lives as long as the server.
                Bytes::from_bytes_vec(unsafe { std::slice::from_raw_parts(from, len) }.to_vec())
            })
            .collect();
        Box::pin(async move { Ok(all) })
    }

    fn write(&mut self, what: Vec<(CopyDescriptor, Bytes)>, _: StreamId) {
        for (descriptor, bytes) in what {
            let (to, len) = self.host_memory(&descriptor.handle);
            // Safety: as above; nobody else holds the allocation now.
            unsafe { std::ptr::copy_nonoverlapping(bytes.as_ptr(), to, bytes.len().min(len)) };
        }
    }

    fn sync(&mut self, _: StreamId) -> DynFut<Result<(), ServerError>> {
        Box::pin(async { Ok(()) })
    }

    fn get_resource(
        &mut self,
        binding: Binding,
        _: StreamId,
    ) -> Result<ManagedResource<<BytesStorage as ComputeStorage>::Resource>, ServerError> {
        let resource: BytesResource =
            self.memory.get_resource(binding.memory.clone(), binding.offset_start, binding.offset_end)?;
        Ok(ManagedResource::new(binding.memory, resource))
    }

    unsafe fn launch(
        &mut self,
        kernel: Self::Kernel,
        cubes: CubeCount,
        arguments: KernelArguments,
        mode: ExecutionMode,
        _: StreamId,
    ) {
        let compiled = kernel
            .compile(&mut Default::default(), &h200_options(), mode, kernel.address_type())
            .expect("the kernel generates");
        let shared_memory = compiled.repr.as_ref().map_or(0, |r| r.shared_memory_size());
        let generated = Generated {
            name: compiled.entrypoint_name,
            key: kernel.id().stable_format(),
            units: compiled.cube_dim.num_elems(),
            shared_memory,
            source: compiled.source,
        };
        if let Some(backwards) = *EMULATION.lock().expect("nobody panicked") {
            let CubeCount::Static(x, y, z) = cubes else { panic!("grids are known on the host") };
            let buffers: Vec<_> = arguments.buffers.iter().map(|b| self.host_memory(b).0.cast()).collect();
            crate::emulate::run(&generated, (x, y, z), &buffers, &arguments.info.data, backwards)
                .unwrap_or_else(|e| panic!("{e}"));
        }
        GENERATED.lock().expect("no generator panicked").push(generated);
    }

    fn flush(&mut self, _: StreamId) -> Result<(), ServerError> {
        Ok(())
    }

    fn memory_usage(&mut self, _: StreamId) -> Result<MemoryUsage, ServerError> {
        Ok(self.memory.memory_usage())
    }

    fn memory_cleanup(&mut self, _: StreamId) {}

    fn start_profile(&mut self, _: StreamId) -> Result<ProfilingToken, ServerError> {
        Ok(self.timestamps.start())
    }

    fn end_profile(&mut self, _: StreamId, token: ProfilingToken) -> Result<ProfileDuration, ProfileError> {
        self.timestamps.stop(token)
    }

    fn allocation_mode(&mut self, mode: MemoryAllocationMode, _: StreamId) {
        self.memory.mode(mode);
    }
}

impl Runtime for OfflineCuda {
    type Compiler = CudaCompiler;
    type Server = OfflineServer;
    type Device = CudaDevice;

    fn client(device: &Self::Device) -> ComputeClient<Self> {
        ComputeClient::load(device)
    }

    fn name(_: &ComputeClient<Self>) -> &'static str {
        "offline-cuda"
    }

    fn require_array_lengths() -> bool {
        true
    }

    fn max_cube_count() -> (u32, u32, u32) {
        CudaRuntime::max_cube_count()
    }

    fn can_read_tensor(shape: &Shape, strides: &Strides) -> bool {
        CudaRuntime::can_read_tensor(shape, strides)
    }

    fn target_properties() -> TargetProperties {
        CudaRuntime::target_properties()
    }

    fn enumerate_devices(_: u16, _: &()) -> Vec<DeviceId> {
        vec![DeviceId::new(0, 0), DeviceId::new(0, 1)]
    }
}
