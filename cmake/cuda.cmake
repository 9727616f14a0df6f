# Sets WITH_CUDA, CUDA_ARCHS and CUDA_ARCHS_TEXT, and enables the language CUDA if nvcc works.
# In mode AUTO whatever is wrong with nvcc is a message, never an error.
include(CheckLanguage)
set(WITH_CUDA OFF)

function(find_nvcc result)
  # nvcc on the path may be a script that stands for the real one: ask it where its toolkit is.
  find_program(SDI_NVCC nvcc HINTS $ENV{CUDACXX} $ENV{CUDA_HOME}/bin $ENV{CUDA_PATH}/bin
               PATHS /usr/local/cuda/bin)
  set(${result} "${SDI_NVCC}" PARENT_SCOPE)
  if(SDI_NVCC)
    execute_process(
      COMMAND ${SDI_NVCC} --dryrun -x cu -c /dev/null -o /dev/null
      ERROR_VARIABLE dryrun
      OUTPUT_QUIET)
    if(dryrun MATCHES "#\\$ TOP=([^\r\n]+)")
      get_filename_component(root "${CMAKE_MATCH_1}" REALPATH)
      if(EXISTS ${root}/bin/nvcc)
        set(${result} "${root}/bin/nvcc" PARENT_SCOPE)
      endif()
    endif()
  endif()
endfunction()

# The architectures asked for, or those of our list that this nvcc knows; machine code for each, and
# PTX of the highest for what comes later.
function(choose_archs nvcc result)
  set(archs ${SDI_FAST_CUDA_ARCHS})
  if(NOT archs)
    execute_process(COMMAND ${nvcc} --list-gpu-arch OUTPUT_VARIABLE known ERROR_QUIET)
    foreach(arch 80 86 89 90 100 120)
      if(known MATCHES "compute_${arch}[^0-9]")
        list(APPEND archs ${arch})
      endif()
    endforeach()
  endif()
  set(last "")
  set(chosen "")
  foreach(arch ${archs})
    if(last)
      list(APPEND chosen "${last}-real")
    endif()
    set(last ${arch})
  endforeach()
  list(APPEND chosen ${last})
  set(${result} "${chosen}" PARENT_SCOPE)
endfunction()

if(NOT SDI_FAST_CUDA STREQUAL "OFF")
  find_nvcc(NVCC)
  if(NVCC)
    choose_archs(${NVCC} CUDA_ARCHS)
    set(CMAKE_CUDA_COMPILER ${NVCC})
    set(CMAKE_CUDA_ARCHITECTURES ${CUDA_ARCHS})
    set(CMAKE_CUDA_RUNTIME_LIBRARY Static)
    check_language(CUDA)
  endif()
  if(NVCC AND CUDA_ARCHS AND CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    include(CheckSourceCompiles)
    check_source_compiles(
      CUDA
      "#include <cuda_runtime.h>
       __global__ void nothing() {}
       int main() { nothing<<<1, 1>>>(); return cudaGetLastError(); }"
      SDI_NVCC_WORKS)
    set(WITH_CUDA ${SDI_NVCC_WORKS})
  endif()
  if(WITH_CUDA)
    string(REPLACE ";" "," CUDA_ARCHS_TEXT "${CUDA_ARCHS}")
    string(REPLACE "-real" "" CUDA_ARCHS_TEXT "${CUDA_ARCHS_TEXT}")
    message(STATUS "sdi_fast: CUDA ${CMAKE_CUDA_COMPILER_VERSION} for ${CUDA_ARCHS_TEXT}")
  elseif(SDI_FAST_CUDA STREQUAL "ON")
    message(FATAL_ERROR "SDI_FAST_CUDA=ON, but no working nvcc was found")
  else()
    message(STATUS "sdi_fast: no working nvcc, building without CUDA kernels")
  endif()
endif()
